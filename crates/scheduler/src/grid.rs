//! The index of one partition: hosts in a grid of free memory by free vCPUs.
//!
//! A row holds hosts with (roughly) the same free memory, a column those with the same free vCPUs. Hosts without any
//! allocation stand in a second set of rows above the first, so that going through the rows upwards is best fit: hosts in
//! use before empty ones, then least free memory, then fewest free vCPUs. Bitmaps over rows and columns skip what
//! is empty. Memory comes first because it is what runs out: it is not overcommitted by default.
//!
//! The other dimensions are checked on the hosts found. Each row and cell knows an upper bound of what its hosts have of
//! them; it rises with every host that comes in and is tightened when a search finds nothing under it.

use crate::amounts::{Amounts, Levels, bucket};
use crate::resources::Resource;

/// Rows for hosts in use; as many again for empty hosts.
const MEMORY_ROWS: usize = 256;
const ROWS: usize = 2 * MEMORY_ROWS;
const COLUMNS: usize = 128;

/// Free memory below the next multiple of this counts as the same.
const MEMORY_UNIT_SHIFT: u32 = 8;
/// Rows per doubling of free memory: 16, so hosts in a row differ by a sixteenth at most (exact up to 8 GiB).
const MEMORY_PRECISION: u32 = 4;
/// Columns per doubling of free vCPUs: 8 (exact up to 16 vCPUs).
const VCPU_PRECISION: u32 = 3;

/// Among so many equally good hosts in one cell the first candidate is drawn.
const TIE_WINDOW: usize = 16;

/// A place in the grid. Ordered as best fit prefers: the smaller, the better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Spot(u32);

impl Spot {
    /// Where a host with this much free belongs.
    #[inline]
    pub(crate) fn of(free: &Amounts, in_use: bool) -> Self {
        let row = memory_row(free) + if in_use { 0 } else { MEMORY_ROWS };
        Self((row * COLUMNS + vcpu_column(free)) as u32)
    }

    #[inline]
    fn row(self) -> usize {
        self.0 as usize / COLUMNS
    }

    #[inline]
    fn column(self) -> usize {
        self.0 as usize % COLUMNS
    }
}

#[inline]
fn memory_row(amounts: &Amounts) -> usize {
    (bucket(amounts.get(Resource::Memory) >> MEMORY_UNIT_SHIFT, MEMORY_PRECISION) as usize).min(MEMORY_ROWS - 1)
}

#[inline]
fn vcpu_column(amounts: &Amounts) -> usize {
    (bucket(amounts.get(Resource::Vcpus), VCPU_PRECISION) as usize).min(COLUMNS - 1)
}

/// What a search asks the grid for.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Target {
    row: usize,
    column: usize,
    levels: Levels,
}

impl Target {
    pub(crate) fn of(wanted: &Amounts) -> Self {
        Self { row: memory_row(wanted), column: vcpu_column(wanted), levels: Levels::of(wanted) }
    }
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    slot: u32,
    levels: Levels,
}

#[derive(Debug, Default)]
struct Cell {
    entries: Vec<Entry>,
    /// No entry is above this.
    bound: Levels,
}

#[derive(Clone, Copy, Debug, Default)]
struct Row {
    /// Columns that hold hosts.
    columns: u128,
    /// No cell is above this.
    bound: Levels,
}

/// The grid. Positions of hosts within their cells are kept outside, in one array for all grids (`positions`, by slot).
#[derive(Debug)]
pub(crate) struct Grid {
    /// Rows that hold hosts.
    occupied: [u64; ROWS / 64],
    rows: Vec<Row>,
    /// Cell numbers plus one, by spot; 0 = never used.
    cell_of: Vec<u32>,
    cells: Vec<Cell>,
    len: usize,
}

/// What the visitor of a search wants next.
pub(crate) enum Visit {
    Continue,
    Stop,
}

impl Grid {
    pub(crate) fn new() -> Self {
        Self {
            occupied: [0; ROWS / 64],
            rows: vec![Row::default(); ROWS],
            cell_of: vec![0; ROWS * COLUMNS],
            cells: Vec::new(),
            len: 0,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn insert(&mut self, slot: u32, spot: Spot, levels: Levels, positions: &mut [u32]) {
        let Some(number) = self.cell_of.get_mut(spot.0 as usize) else { return };
        if *number == 0 {
            self.cells.push(Cell::default());
            *number = self.cells.len() as u32;
        }
        let (Some(cell), Some(row)) = (self.cells.get_mut(*number as usize - 1), self.rows.get_mut(spot.row())) else {
            return;
        };
        if cell.entries.is_empty() {
            cell.bound = Levels::default();
            if row.columns == 0 {
                row.bound = Levels::default();
                if let Some(word) = self.occupied.get_mut(spot.row() / 64) {
                    *word |= 1 << (spot.row() % 64);
                }
            }
            row.columns |= 1 << spot.column();
        }
        if let Some(position) = positions.get_mut(slot as usize) {
            *position = cell.entries.len() as u32;
        }
        cell.entries.push(Entry { slot, levels });
        cell.bound = cell.bound.max(levels);
        row.bound = row.bound.max(levels);
        self.len += 1;
    }

    pub(crate) fn remove(&mut self, slot: u32, spot: Spot, positions: &mut [u32]) {
        let Some(cell) = cell_mut(&self.cell_of, &mut self.cells, spot) else { return };
        let Some(&position) = positions.get(slot as usize) else { return };
        if cell.entries.get(position as usize).is_none_or(|entry| entry.slot != slot) {
            return;
        }
        cell.entries.swap_remove(position as usize);
        self.len -= 1;
        if let Some(moved) = cell.entries.get(position as usize)
            && let Some(its_position) = positions.get_mut(moved.slot as usize)
        {
            *its_position = position;
        }
        if cell.entries.is_empty()
            && let Some(row) = self.rows.get_mut(spot.row())
        {
            row.columns &= !(1 << spot.column());
            if row.columns == 0
                && let Some(word) = self.occupied.get_mut(spot.row() / 64)
            {
                *word &= !(1 << (spot.row() % 64));
            }
        }
    }

    /// Notes a host's changed minor dimensions; its spot stays.
    pub(crate) fn update(&mut self, slot: u32, spot: Spot, levels: Levels, positions: &[u32]) {
        let Some(cell) = cell_mut(&self.cell_of, &mut self.cells, spot) else { return };
        let Some(&position) = positions.get(slot as usize) else { return };
        if let Some(entry) = cell.entries.get_mut(position as usize)
            && entry.levels != levels
        {
            entry.levels = levels;
            cell.bound = cell.bound.max(levels);
            if let Some(row) = self.rows.get_mut(spot.row()) {
                row.bound = row.bound.max(levels);
            }
        }
    }

    /// Shows the visitor every host that can possibly hold the target (it must still check), the smallest spot first or
    /// (`descending`) the largest; within one cell it starts at random (`random_start` draws below a bound) with one of
    /// the [`TIE_WINDOW`] hosts that came in last.
    pub(crate) fn search(
        &mut self,
        target: Target,
        descending: bool,
        mut random_start: impl FnMut(usize) -> usize,
        mut visit: impl FnMut(Spot, u32) -> Visit,
    ) {
        let in_use = (target.row, MEMORY_ROWS);
        let empty = (MEMORY_ROWS + target.row, ROWS);
        for (from, to) in if descending { [empty, in_use] } else { [in_use, empty] } {
            let mut next = if descending { self.row_below(to, from) } else { self.row_at_or_above(from, to) };
            while let Some(index) = next {
                if let Visit::Stop = self.search_row(index, target, descending, &mut random_start, &mut visit) {
                    return;
                }
                next = if descending { self.row_below(index, from) } else { self.row_at_or_above(index + 1, to) };
            }
        }
    }

    /// The first row in `from..to` that holds hosts.
    #[inline]
    fn row_at_or_above(&self, from: usize, to: usize) -> Option<usize> {
        let mut mask = u64::MAX << (from % 64);
        for (index, word) in self.occupied.iter().enumerate().take(to.div_ceil(64)).skip(from / 64) {
            let rest = word & mask;
            if rest != 0 {
                let row = index * 64 + rest.trailing_zeros() as usize;
                return (row < to).then_some(row);
            }
            mask = u64::MAX;
        }
        None
    }

    /// The last row in `from..below` that holds hosts.
    #[inline]
    fn row_below(&self, below: usize, from: usize) -> Option<usize> {
        let last = below.checked_sub(1)?;
        let mut mask = u64::MAX >> (63 - last % 64);
        for index in (from / 64..=last / 64).rev() {
            let rest = self.occupied.get(index)? & mask;
            if rest != 0 {
                let row = index * 64 + 63 - rest.leading_zeros() as usize;
                return (row >= from).then_some(row);
            }
            mask = u64::MAX;
        }
        None
    }

    #[inline]
    fn search_row(
        &mut self,
        index: usize,
        target: Target,
        descending: bool,
        random_start: &mut impl FnMut(usize) -> usize,
        visit: &mut impl FnMut(Spot, u32) -> Visit,
    ) -> Visit {
        let Some(row) = self.rows.get_mut(index) else { return Visit::Continue };
        let mut columns = row.columns & (u128::MAX << target.column);
        if columns == 0 || !row.bound.may_fit(target.levels) {
            return Visit::Continue;
        }
        let mut found = false;
        while columns != 0 {
            let column = if descending { 127 - columns.leading_zeros() } else { columns.trailing_zeros() };
            columns &= !(1 << column);
            let spot = Spot((index * COLUMNS) as u32 + column);
            let Some(cell) = cell_mut(&self.cell_of, &mut self.cells, spot) else { continue };
            if !cell.bound.may_fit(target.levels) {
                continue;
            }
            // Downwards from one of the last entries, then the rest: the last came in most lately, so that they are likely
            // still in the processor's cache.
            let len = cell.entries.len();
            let end = len - random_start(len.min(TIE_WINDOW));
            let (until, after) = cell.entries.split_at_checked(end).unwrap_or((&cell.entries, &[]));
            let mut found_here = false;
            for entry in until.iter().rev().chain(after.iter().rev()) {
                if entry.levels.may_fit(target.levels) {
                    found_here = true;
                    if let Visit::Stop = visit(spot, entry.slot) {
                        return Visit::Stop;
                    }
                }
            }
            if !found_here {
                cell.bound = cell.entries.iter().fold(Levels::default(), |bound, entry| bound.max(entry.levels));
            }
            found |= found_here;
        }
        if !found {
            self.tighten_row(index);
        }
        Visit::Continue
    }

    #[cold]
    fn tighten_row(&mut self, index: usize) {
        let Some(row) = self.rows.get_mut(index) else { return };
        let mut columns = row.columns;
        let mut bound = Levels::default();
        while columns != 0 {
            let spot = Spot((index * COLUMNS) as u32 + columns.trailing_zeros());
            columns &= columns - 1;
            if let Some(cell) = cell_mut(&self.cell_of, &mut self.cells, spot) {
                bound = bound.max(cell.bound);
            }
        }
        row.bound = bound;
    }
}

#[inline]
fn cell_mut<'a>(cell_of: &[u32], cells: &'a mut [Cell], spot: Spot) -> Option<&'a mut Cell> {
    let number = *cell_of.get(spot.0 as usize)?;
    cells.get_mut((number as usize).checked_sub(1)?)
}

#[cfg(test)]
#[path = "grid_test.rs"]
mod tests;
