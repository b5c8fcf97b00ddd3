//! The region: API services, accounts, reconcilers and scheduling.
