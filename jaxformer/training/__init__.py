"""Gradient descent: the optimizer, the state, the step, and the loop around it."""
