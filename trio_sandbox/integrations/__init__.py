"""Sandboxes for other programs' frameworks, each in an extra of its own. Made of the public interface only."""
