"""What must give the same bits on any number of ranks: the objective, its gradients, and their sum."""
