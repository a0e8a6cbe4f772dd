"""The guest's side of connections to the outside: by name, without a network device."""
