"""What estimates are held against: exact refits, Newton steps, laplace-torch, and the published estimates."""
