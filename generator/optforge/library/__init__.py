"""Rules as people hold them, and as they name them."""
