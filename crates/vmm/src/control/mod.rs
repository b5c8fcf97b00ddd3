//! The agent's side channel into a VMM: messages, and the socket they travel on.

pub mod protocol;
