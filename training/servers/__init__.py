"""The parameter server: shards of the parameters, each on several replicas, updated once per step and in one order."""
