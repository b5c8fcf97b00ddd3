//! Pure placement: hosts in, decision out. No I/O, no clock of its own.
