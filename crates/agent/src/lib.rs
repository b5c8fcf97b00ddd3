//! One host: reconciles desired instances and owns their VMM processes.
