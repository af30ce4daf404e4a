"""Random rules and compositions, an oracle of the language, and what runs, compares and shrinks them: see ../fuzz.py."""
