"""Pages and figures; reads records only."""
