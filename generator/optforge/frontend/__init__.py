"""From a rule's text to a kernel: parse, compose, elaborate, lower."""
