//! Tests of the engine: on a simulated disk that loses power, and on real files.

pub(crate) mod disk;
mod history;
mod invariants;
mod models;
mod process;
mod real;
mod schedule;
mod staged;
mod world;
mod writers;
