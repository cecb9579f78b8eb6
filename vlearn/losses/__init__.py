"""The loss of each example, its Hessian in the model's output, and random gradients that hold that Hessian."""
