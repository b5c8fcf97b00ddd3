//! The control plane's transactional key-value store with revisions, watch and leases.
