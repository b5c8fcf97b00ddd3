//! Ids, units, states and their legal transitions, instance types, resources, tags and filters. No I/O.

pub mod enrolment;
pub mod id;
pub mod instance;
pub mod instance_type;
pub mod resources;

pub use enrolment::{CONTROL_SERVER_NAME, JoinToken, JoinTokenError};
pub use id::{AccountId, HostId, ImageId, InstanceId, KeyPairId, ReservationId, VolumeId};
pub use instance::{InstanceState, StateReason, StateTransitionError};
pub use instance_type::{Catalogue, CatalogueError, InstanceType};
pub use resources::Resources;
