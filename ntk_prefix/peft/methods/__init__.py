"""One file a method, or a family of them."""
