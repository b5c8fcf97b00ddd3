//! AES-256-XTS (IEEE Std 1619-2018) over 512-byte data units.
//!
//! The data unit number is the byte offset on the volume divided by 512, little-endian, as in dm-crypt's `plain64`. One
//! addition: **a data unit whose stored bytes are all zero reads as zeros**, so that holes of a sparse file read as zeros
//! under any key. (A real unit encrypts to all zeros with probability 2^-4096.)

use std::fmt;

use aes::cipher::{Block, BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};
use aes::{Aes256Dec, Aes256Enc};
use zeroize::Zeroizing;

/// Bytes encrypted under one tweak.
pub const DATA_UNIT_BYTES: usize = 512;
const BLOCKS: usize = DATA_UNIT_BYTES / 16;

/// A volume's key: data key then tweak key, 32 bytes each. Zeroed when dropped; never printed.
#[derive(Clone)]
pub struct XtsKey(Zeroizing<[u8; 64]>);

impl XtsKey {
    /// Takes key material.
    ///
    /// # Errors
    /// `None` when both halves are equal, which IEEE 1619 and FIPS 140 forbid.
    pub fn new(bytes: [u8; 64]) -> Option<Self> {
        let key = Self(Zeroizing::new(bytes));
        let (data, tweak) = key.halves();
        (data != tweak).then_some(key)
    }

    fn halves(&self) -> (&[u8], &[u8]) {
        self.0.split_at(32)
    }

    /// The material, for a process that is to have it: data key then tweak key.
    pub fn material(&self) -> Zeroizing<[u8; 64]> {
        self.0.clone()
    }

    /// Encrypts whole data units in place; `offset` is the first one's place on the volume in bytes.
    pub fn encrypt(&self, bytes: &mut [u8], offset: u64) {
        Xts::new(self).encrypt(bytes, offset);
    }

    /// Decrypts whole data units in place, leaving units of zeros alone.
    pub fn decrypt(&self, bytes: &mut [u8], offset: u64) {
        Xts::new(self).decrypt(bytes, offset);
    }
}

impl fmt::Debug for XtsKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("XtsKey(..)")
    }
}

/// The expanded key.
pub(crate) struct Xts {
    encrypt: Aes256Enc,
    decrypt: Aes256Dec,
    tweak: Aes256Enc,
}

impl fmt::Debug for Xts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Xts(..)")
    }
}

type Unit = [Block<Aes256Enc>; BLOCKS];

impl Xts {
    pub(crate) fn new(key: &XtsKey) -> Self {
        let (data, tweak) = key.halves();
        // 32 bytes always fit; the defaults are never used.
        let array = |half: &[u8]| half.try_into().unwrap_or_default();
        let (data, tweak): ([u8; 32], [u8; 32]) = (array(data), array(tweak));
        Self {
            encrypt: Aes256Enc::new(&data.into()),
            decrypt: Aes256Dec::new(&data.into()),
            tweak: Aes256Enc::new(&tweak.into()),
        }
    }

    /// Encrypts whole data units in place; `offset` is the first one's place on the volume in bytes.
    pub(crate) fn encrypt(&self, bytes: &mut [u8], offset: u64) {
        self.units(bytes, offset, |unit| self.encrypt.encrypt_blocks(unit), false);
    }

    /// Decrypts whole data units in place, leaving units of zeros alone.
    pub(crate) fn decrypt(&self, bytes: &mut [u8], offset: u64) {
        self.units(bytes, offset, |unit| self.decrypt.decrypt_blocks(unit), true);
    }

    fn units(&self, bytes: &mut [u8], offset: u64, cipher: impl Fn(&mut [Block<Aes256Enc>]), skip_zeros: bool) {
        let first = offset / DATA_UNIT_BYTES as u64;
        for (number, bytes) in (first..).zip(bytes.chunks_exact_mut(DATA_UNIT_BYTES)) {
            if skip_zeros && is_zero(bytes) {
                continue;
            }
            let tweaks = self.tweaks(number);
            let mut unit: Unit = [Block::<Aes256Enc>::default(); BLOCKS];
            for ((block, bytes), tweak) in unit.iter_mut().zip(bytes.chunks_exact(16)).zip(&tweaks) {
                *block = xor(bytes, *tweak).into();
            }
            cipher(&mut unit);
            for ((block, bytes), tweak) in unit.iter().zip(bytes.chunks_exact_mut(16)).zip(&tweaks) {
                bytes.copy_from_slice(&xor(block, *tweak));
            }
        }
    }

    /// The tweak of each 16-byte block: E(unit number) times alpha^j in GF(2^128).
    fn tweaks(&self, number: u64) -> [u128; BLOCKS] {
        let mut block: Block<Aes256Enc> = u128::from(number).to_le_bytes().into();
        self.tweak.encrypt_block(&mut block);
        let mut tweak = u128::from_le_bytes(block.into());
        let mut tweaks = [0; BLOCKS];
        for each in &mut tweaks {
            *each = tweak;
            tweak = (tweak << 1) ^ (if tweak >> 127 == 1 { 0x87 } else { 0 });
        }
        tweaks
    }
}

fn xor(bytes: &[u8], tweak: u128) -> [u8; 16] {
    let block = bytes.try_into().map_or(0, u128::from_le_bytes);
    (block ^ tweak).to_le_bytes()
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks_exact(16).all(|block| block.try_into().map_or(1, u128::from_le_bytes) == 0)
}

#[cfg(test)]
mod tests;
