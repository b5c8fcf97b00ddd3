//! Random choices that can be made again.

/// A small generator, begun by `HEARTH_SEED`, so that a failing run can be repeated from the number it prints.
pub struct Choices(u64);

impl Choices {
    /// Tells its seed on standard output.
    pub fn new() -> Self {
        let given = std::env::var("HEARTH_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = given.unwrap_or(u64::from(std::process::id()));
        println!("HEARTH_SEED={seed}");
        Self(seed)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }

    /// Sleeps for less than `milliseconds`.
    pub fn pause(&mut self, milliseconds: u64) {
        std::thread::sleep(std::time::Duration::from_millis(self.below(milliseconds)));
    }
}

impl Default for Choices {
    fn default() -> Self {
        Self::new()
    }
}
