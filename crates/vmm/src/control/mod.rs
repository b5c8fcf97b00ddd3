//! The agent's side channel into a VMM: messages, and the socket they travel on.

pub mod client;
pub mod lock;
mod obey;
pub mod protocol;
pub mod server;
pub mod socket;
