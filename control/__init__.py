"""The control server: tenants, keys, quotas, models, nodes, and the router in front of the nodes."""
