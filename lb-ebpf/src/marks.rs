//! The bitmaps of a pair: three levels, so that a place with a free port is found in three steps among 65,536 ports.
//!
//! A bit above says that the word below is not zero. It may say so for a moment when it no longer is, which costs a
//! searcher one try. It never stays clear above a word that is not zero: whoever clears it looks below once more, and
//! whoever sets a bit below sets the one above afterwards.

use core::sync::atomic::Ordering::Relaxed;

use lb_common::{
    bits::lowest,
    pair::{Mark, PLACES, Pair, WORDS},
};

use crate::{atomic, opaque::opaque};

/// No place has the mark.
pub(crate) const NONE: u32 = u32::MAX;

/// Gives a place a mark.
#[inline(always)]
pub(crate) fn mark(pair: &Pair, mark: Mark, place: u32) {
    let word = place as usize / 64 & (WORDS - 1);
    atomic::set(&pair.words[mark as usize][word], 1 << (place & 63));
    atomic::set_top(&pair.tops[mark as usize], 1 << word);
}

/// Takes a mark away; false when another CPU was first.
#[inline(always)]
pub(crate) fn unmark(pair: &Pair, mark: Mark, place: u32) -> bool {
    let word = place as usize / 64 & (WORDS - 1);
    let (cell, bit) = (&pair.words[mark as usize][word], 1 << (place & 63));
    let old = atomic::keep(cell, !bit);
    if old == bit {
        atomic::keep_top(&pair.tops[mark as usize], !(1 << word));
        if cell.load(Relaxed) != 0 {
            atomic::set_top(&pair.tops[mark as usize], 1 << word);
        }
    }
    old & bit != 0
}

/// The first place with the mark at or after one, round the whole range.
#[inline(always)]
pub(crate) fn find(pair: &Pair, mark: Mark, from: u32) -> u32 {
    let kind = mark as usize;
    let from = from & (PLACES as u32 - 1);
    let mut word = from as usize / 64;
    let mut bits = pair.words[kind][word].load(Relaxed) & (u64::MAX << (from & 63));
    if bits == 0 {
        let top = u64::from(pair.tops[kind].load(Relaxed));
        // The words behind this one, then all of them from the first on.
        let behind = top & (u64::MAX << 1 << word);
        let round = behind | top << WORDS;
        if round == 0 {
            return NONE;
        }
        word = lowest(opaque(round)) as usize & (WORDS - 1);
        bits = pair.words[kind][word].load(Relaxed);
        if bits == 0 {
            // It emptied just now, or whoever emptied it has not come to say so.
            settle_top(pair, kind, word);
            return NONE;
        }
    }
    (word as u32) * 64 + (lowest(opaque(bits)) & 63)
}

#[inline(always)]
fn settle_top(pair: &Pair, kind: usize, word: usize) {
    atomic::keep_top(&pair.tops[kind], !(1 << word));
    if pair.words[kind][word].load(Relaxed) != 0 {
        atomic::set_top(&pair.tops[kind], 1 << word);
    }
}
