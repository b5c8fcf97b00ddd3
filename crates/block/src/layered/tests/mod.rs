//! Tests of the engine: on a simulated disk that loses power, and on real files.

pub(crate) mod disk;
mod ends;
mod history;
mod invariants;
mod models;
mod real;
mod world;
mod writers;
