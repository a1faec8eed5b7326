"""The state of a training, as bytes, and how they come to the store and back."""
