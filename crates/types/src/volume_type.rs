//! EBS volume types: which sizes they may have and which speed they get.
//! Sources: <https://docs.aws.amazon.com/ebs/latest/userguide/ebs-volume-types.html> and the pages of the types.
//!
//! Decisions: volumes of gp2, st1 and sc1 always get what EC2 gives them while they burst (there are no burst credits to run
//! out of). An explicit 0 for IOPS or throughput means "not limited", for hosts that are not shared.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

use crate::volume::GIB;

const TIB: u64 = 1 << 40;

/// EC2's volume types.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum VolumeType {
    /// General purpose SSD whose speed does not depend on its size.
    Gp3,
    /// General purpose SSD.
    Gp2,
    /// Provisioned IOPS SSD.
    Io1,
    /// Provisioned IOPS SSD.
    Io2,
    /// Throughput optimized HDD.
    St1,
    /// Cold HDD.
    Sc1,
    /// Magnetic.
    Standard,
}

/// What a volume may do; 0 = not limited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VolumeLimits {
    /// I/O operations of up to 256 KiB each, per second.
    pub iops: u32,
    /// MiB per second.
    pub throughput_mibps: u32,
}

/// Why a volume cannot be as asked.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum VolumeTypeError {
    /// No such type.
    #[error("'{0:.20}' is no volume type; use gp3, gp2, io1, io2, st1, sc1 or standard")]
    Unknown(String),
    /// Too small or too large.
    #[error("a {kind} volume has {least} to {most} GiB, not {asked}")]
    Size {
        /// Type.
        kind: VolumeType,
        /// GiB.
        least: u64,
        /// GiB.
        most: u64,
        /// GiB.
        asked: u64,
    },
    /// The type's IOPS follow from its size.
    #[error("the IOPS of a {0} volume cannot be chosen")]
    FixedIops(VolumeType),
    /// The type's throughput follows from its size or IOPS.
    #[error("the throughput of a {0} volume cannot be chosen")]
    FixedThroughput(VolumeType),
    /// io1 and io2 have no baseline.
    #[error("a {0} volume needs its IOPS to be given")]
    IopsNeeded(VolumeType),
    /// Out of range.
    #[error("a {kind} volume of {gib} GiB has {least} to {most} IOPS, not {asked}")]
    Iops {
        /// Type.
        kind: VolumeType,
        /// Size.
        gib: u64,
        /// IOPS.
        least: u32,
        /// IOPS.
        most: u32,
        /// IOPS.
        asked: u32,
    },
    /// Out of range.
    #[error("a {kind} volume with {iops} IOPS has {least} to {most} MiB/s, not {asked}")]
    Throughput {
        /// Type.
        kind: VolumeType,
        /// IOPS it has.
        iops: u32,
        /// MiB/s.
        least: u32,
        /// MiB/s.
        most: u32,
        /// MiB/s.
        asked: u32,
    },
}

impl VolumeType {
    /// Every type.
    pub const ALL: [Self; 7] = [Self::Gp3, Self::Gp2, Self::Io1, Self::Io2, Self::St1, Self::Sc1, Self::Standard];

    /// EC2's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gp3 => "gp3",
            Self::Gp2 => "gp2",
            Self::Io1 => "io1",
            Self::Io2 => "io2",
            Self::St1 => "st1",
            Self::Sc1 => "sc1",
            Self::Standard => "standard",
        }
    }

    /// Snapshots of one volume that may be in the making at the same time.
    /// Source: <https://docs.aws.amazon.com/general/latest/gr/ebs-service.html>
    pub fn max_pending_snapshots(self) -> usize {
        match self {
            Self::Gp3 | Self::Gp2 | Self::Io1 | Self::Io2 => 5,
            Self::St1 | Self::Sc1 | Self::Standard => 1,
        }
    }

    /// Smallest and largest size in bytes.
    pub fn sizes(self) -> (u64, u64) {
        match self {
            Self::Gp3 => (GIB, 64 * TIB),
            Self::Gp2 => (GIB, 16 * TIB),
            Self::Io1 => (4 * GIB, 16 * TIB),
            Self::Io2 => (4 * GIB, 64 * TIB),
            Self::St1 | Self::Sc1 => (125 * GIB, 16 * TIB),
            Self::Standard => (GIB, TIB),
        }
    }

    /// Smallest, largest and largest-per-GiB IOPS that can be asked for; `None` where they cannot.
    fn iops_range(self) -> Option<(u32, u32, u64)> {
        match self {
            Self::Gp3 => Some((3000, 80_000, 500)),
            Self::Io1 => Some((100, 64_000, 50)),
            Self::Io2 => Some((100, 256_000, 1000)),
            Self::Gp2 | Self::St1 | Self::Sc1 | Self::Standard => None,
        }
    }

    /// IOPS of a volume that becomes one of this type when none are asked for: 3,000, or what its size allows. `None` where they
    /// follow from the size. Source: <https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_ModifyVolume.html>
    pub fn iops_after_change(self, size_bytes: u64) -> Option<u32> {
        let (least, most, per_gib) = self.iops_range()?;
        let by_size = u32::try_from(size_bytes.div_ceil(GIB).saturating_mul(per_gib)).unwrap_or(u32::MAX);
        Some(by_size.clamp(least, most).min(3000))
    }

    /// Checks a volume of this type and tells what it may do. `None` asks for the type's own figure, 0 for none.
    pub fn limits(
        self,
        size_bytes: u64,
        iops: Option<u32>,
        throughput_mibps: Option<u32>,
    ) -> Result<VolumeLimits, VolumeTypeError> {
        let gib = size_bytes.div_ceil(GIB);
        let (least, most) = self.sizes();
        if size_bytes.div_ceil(GIB) * GIB < least || size_bytes > most {
            return Err(VolumeTypeError::Size { kind: self, least: least / GIB, most: most / GIB, asked: gib });
        }
        let iops = match (iops, self.iops_range()) {
            (Some(0), _) => 0,
            (Some(_), None) => return Err(VolumeTypeError::FixedIops(self)),
            (Some(asked), Some((least, most, per_gib))) => {
                let most = u32::try_from(gib * per_gib).unwrap_or(u32::MAX).clamp(least, most);
                if !(least..=most).contains(&asked) {
                    return Err(VolumeTypeError::Iops { kind: self, gib, least, most, asked });
                }
                asked
            }
            (None, _) => self.baseline_iops(gib)?,
        };
        let throughput_mibps = match throughput_mibps {
            Some(0) => 0,
            Some(asked) if self == Self::Gp3 => {
                let effective = if iops == 0 { 80_000 } else { iops };
                let (least, most) = (125, (effective / 4).clamp(125, 2000));
                if !(least..=most).contains(&asked) {
                    return Err(VolumeTypeError::Throughput { kind: self, iops, least, most, asked });
                }
                asked
            }
            Some(_) => return Err(VolumeTypeError::FixedThroughput(self)),
            None => self.baseline_throughput(gib, iops),
        };
        Ok(VolumeLimits { iops, throughput_mibps })
    }

    fn baseline_iops(self, gib: u64) -> Result<u32, VolumeTypeError> {
        Ok(match self {
            Self::Gp3 => 3000,
            Self::Gp2 => u32::try_from(gib * 3).unwrap_or(u32::MAX).clamp(3000, 16_000),
            Self::Io1 | Self::Io2 => return Err(VolumeTypeError::IopsNeeded(self)),
            // Their operations are of 1 MiB: throughput is what limits them.
            Self::St1 | Self::Sc1 => 0,
            Self::Standard => 200,
        })
    }

    fn baseline_throughput(self, gib: u64, iops: u32) -> u32 {
        let per_tib = |mibps: u64, most: u64| u32::try_from((gib * mibps / 1024).clamp(1, most)).unwrap_or(u32::MAX);
        match self {
            Self::Gp3 => 125,
            Self::Gp2 => {
                if gib <= 170 {
                    128
                } else {
                    250
                }
            }
            // 256 KiB for each operation up to the type's most.
            Self::Io1 => {
                if iops == 0 {
                    0
                } else {
                    (iops / 4).clamp(1, 1000)
                }
            }
            Self::Io2 => {
                if iops == 0 {
                    0
                } else {
                    (iops / 4).clamp(1, 4000)
                }
            }
            Self::St1 => per_tib(250, 500),
            Self::Sc1 => per_tib(80, 250),
            Self::Standard => 90,
        }
    }
}

impl FromStr for VolumeType {
    type Err = VolumeTypeError;
    fn from_str(text: &str) -> Result<Self, VolumeTypeError> {
        Self::ALL.into_iter().find(|kind| kind.name() == text).ok_or_else(|| VolumeTypeError::Unknown(text.to_owned()))
    }
}

impl fmt::Display for VolumeType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(kind: &str, gib: u64, iops: Option<u32>, mibps: Option<u32>) -> Result<(u32, u32), String> {
        let kind: VolumeType = kind.parse().unwrap();
        kind.limits(gib * GIB, iops, mibps).map(|l| (l.iops, l.throughput_mibps)).map_err(|error| error.to_string())
    }

    #[test]
    fn types_have_the_figures_of_ebs() {
        assert_eq!(limits("gp3", 1, None, None), Ok((3000, 125)));
        assert_eq!(limits("gp3", 100, Some(16_000), Some(1000)), Ok((16_000, 1000)));
        assert_eq!(limits("gp2", 8, None, None), Ok((3000, 128)));
        assert_eq!(limits("gp2", 2000, None, None), Ok((6000, 250)));
        assert_eq!(limits("io2", 10, Some(10_000), None), Ok((10_000, 2500)));
        assert_eq!(limits("st1", 1024, None, None), Ok((0, 250)));
        assert_eq!(limits("sc1", 125, None, None), Ok((0, 9)));
        assert_eq!(limits("standard", 1, None, None), Ok((200, 90)));
        assert_eq!(limits("gp3", 1, Some(0), Some(0)), Ok((0, 0)));
    }

    #[test]
    fn a_changed_type_begins_with_the_iops_of_ebs() {
        let after = |kind: VolumeType, gib: u64| kind.iops_after_change(gib * GIB);
        assert_eq!((after(VolumeType::Io2, 100), after(VolumeType::Io1, 100)), (Some(3000), Some(3000)));
        assert_eq!((after(VolumeType::Gp3, 1), after(VolumeType::Io1, 8)), (Some(3000), Some(400)));
        assert_eq!((after(VolumeType::Gp2, 8), after(VolumeType::St1, 200)), (None, None));
        for kind in VolumeType::ALL {
            let (least, most) = kind.sizes();
            for size in [least, most] {
                assert!(kind.limits(size, kind.iops_after_change(size), None).is_ok(), "{kind} of {size}");
            }
        }
    }

    #[test]
    fn what_a_type_does_not_offer_is_refused_in_words() {
        let cases = [
            (limits("gp3", 1, Some(4000), None), "3000 to 3000 IOPS"),
            (limits("gp3", 100, Some(3000), Some(1000)), "125 to 750 MiB/s"),
            (limits("gp2", 8, Some(100), None), "cannot be chosen"),
            (limits("io1", 8, None, None), "needs its IOPS"),
            (limits("io2", 8, Some(100), Some(1)), "cannot be chosen"),
            (limits("st1", 8, None, None), "125 to 16384 GiB"),
            (limits("standard", 2000, None, None), "1 to 1024 GiB"),
        ];
        for (result, words) in cases {
            let error = result.unwrap_err();
            assert!(error.contains(words), "{error}");
        }
        assert!("gp4".parse::<VolumeType>().unwrap_err().to_string().contains("gp4"));
    }
}
