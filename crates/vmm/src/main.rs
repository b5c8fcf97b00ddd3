//! One microVM.

fn main() {}
