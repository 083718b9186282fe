"""Images, their encoders, and the items of training with everything that is random about them."""
