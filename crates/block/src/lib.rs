//! Volumes as the VMM sees them: the volume trait and its raw-file engine.
