"""What all rooms stand on: the intermediate form, functions, dtypes and formats, the summation tree, diagnostics."""
