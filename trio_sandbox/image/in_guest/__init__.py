"""Texts that the interpreters of images run: a container image may have no other program. `in_guest_program` makes command lines of them."""
