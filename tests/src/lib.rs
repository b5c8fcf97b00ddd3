//! Whole-system tests that drive the built binaries.
