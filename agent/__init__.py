"""One node: the loop, the tenants' HTTP surface, workers, devices, and the link to control."""
