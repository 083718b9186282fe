"""Images, and the items of training with everything random about them."""
