"""The C target in this process: compile, load, step."""
