//! Ids, units, states and their legal transitions, instance types, resources, tags and filters. No I/O.

pub mod credentials;
pub mod enrolment;
pub mod filter;
pub mod id;
pub mod instance;
pub mod instance_type;
pub mod packed;
pub mod resources;
pub mod tag;
pub mod volume;
pub mod volume_type;

pub use credentials::Credentials;
pub use enrolment::{CONTROL_SERVER_NAME, JoinToken, JoinTokenError};
pub use filter::{FilterError, Filters, Pattern};
pub use id::{AccountId, HostId, ImageId, InstanceId, KeyPairId, ReservationId, SnapshotId, VolumeId};
pub use instance::{InstanceState, StateReason, StateTransitionError};
pub use instance_type::{Catalogue, CatalogueError, InstanceType};
pub use packed::{Packed, ResourceId};
pub use resources::Resources;
pub use tag::{TagError, check_tags};
pub use volume::{AttachmentState, SnapshotState, VolumeState, check_device_name};
pub use volume_type::{VolumeLimits, VolumeType, VolumeTypeError};
