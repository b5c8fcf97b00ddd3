//! hearthd: control plane and agent, in one process or apart.
