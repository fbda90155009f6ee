"""What goes over the wire, as pydantic models; validation only, no behaviour."""
