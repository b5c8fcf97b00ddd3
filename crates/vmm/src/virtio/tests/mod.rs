//! The devices as a driver sees them: through PCI configuration space, BAR registers and rings in guest memory.

mod balloon_test;
mod block_test;
mod driver;
mod hostile_test;
mod hotplug_test;
mod layered_test;
mod lifecycle_test;
mod machine;
mod nbd_test;
mod net_test;
mod rng_test;
mod stress_test;
mod transport_test;
mod volumes;
