//! hearth: the command line.
