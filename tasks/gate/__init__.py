"""Whether a challenger may become champion: a policy, a decision with its reasons, and the record of it."""
