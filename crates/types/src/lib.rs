//! Ids, units, states and their legal transitions, instance types, resources, tags and filters. No I/O.
