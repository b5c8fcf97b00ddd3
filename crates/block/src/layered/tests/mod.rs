//! Tests of the engine: on a simulated disk that loses power, and on real files.

mod denied;
pub(crate) mod disk;
mod files;
mod full;
mod history;
mod invariants;
mod models;
mod process;
mod reader;
mod real;
mod schedule;
mod staged;
mod world;
mod writers;
