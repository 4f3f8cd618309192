"""HTTP routes of the control server, one module per resource."""
