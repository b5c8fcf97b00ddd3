//! Turns a host's desired network into kernel state and answers DHCP and instance metadata.
