//! What a VMM process costs beside its guest's memory, out of the kernel's `/proc/PID/smaps`.

/// Memory of one process, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryUse {
    /// Proportional set size without guest RAM: pages shared with other processes count in part.
    pub pss: u64,
    /// Resident set size without guest RAM.
    pub rss: u64,
    /// Private modified pages without guest RAM: what one more VMM costs the host.
    pub private_dirty: u64,
    /// Resident guest RAM.
    pub guest_rss: u64,
}

/// Sums up the text of `/proc/PID/smaps`; mappings inside `guest_ram` (start and length of each host address range, from
/// `Stats`) count as guest memory.
pub fn parse(smaps: &str, guest_ram: &[(u64, u64)]) -> MemoryUse {
    let mut sum = MemoryUse::default();
    let mut guest = false;
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        let (Some(first), second) = (words.next(), words.next()) else { continue };
        if let Some(field) = first.strip_suffix(':') {
            let bytes = second.and_then(|n| n.parse::<u64>().ok()).unwrap_or(0).saturating_mul(1024);
            match (field, guest) {
                ("Rss", true) => sum.guest_rss += bytes,
                ("Rss", false) => sum.rss += bytes,
                ("Pss", false) => sum.pss += bytes,
                ("Private_Dirty", false) => sum.private_dirty += bytes,
                _ => {}
            }
        } else if let Some(start) = first.split('-').next().and_then(|s| u64::from_str_radix(s, 16).ok()) {
            guest = guest_ram.iter().any(|(base, length)| (*base..base.saturating_add(*length)).contains(&start));
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_ram_is_told_apart() {
        let text = "\
7f0000000000-7f0010000000 rw-p 00000000 00:00 0
Rss:              2048 kB
Pss:              2048 kB
Private_Dirty:    2048 kB
VmFlags: rd wr
7f0020000000-7f0020001000 r-xp 00000000 00:00 0  /usr/bin/hearth-vmm
Rss:                 4 kB
Pss:                 2 kB
Pss_Dirty:          99 kB
Private_Dirty:       1 kB
";
        let sum = parse(text, &[(0x7f00_0000_0000, 0x1000_0000)]);
        assert_eq!(sum, MemoryUse { pss: 2048, rss: 4096, private_dirty: 1024, guest_rss: 2 << 20 });
        assert_eq!(parse("nonsense\n\n:::", &[]), MemoryUse::default());
    }
}
