//! The maps of policies, rates and events.
//!
//! | map | writer | when full |
//! | --- | --- | --- |
//! | `PREFIXES`, `GUARDS`, `POLICIES`, `RULES`, `BOUNDS`, `SCHEDULED`, `CONDITIONS` | daemon | the generation is refused before anything changes |
//! | `JUDGED` | daemon | fixed |
//! | `RULE_CELLS`, `BUDGETS`, `KNOCK` | programs | fixed |
//! | `SOURCES` | programs | the source that was quiet longest is forgotten |
//! | `EVENTS` | programs, emptied by the daemon | events are left out and counted |
//! | `EXPLANATION` | `explain_tc` | one record |

use core::sync::atomic::Ordering::Relaxed;

use aya_ebpf::{
    helpers,
    macros::map,
    maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf, lpm_trie::Key},
};
use lb_common::{
    access::{
        Action, Bound, Budget, Event, Explanation, Guard, MAX_BOUNDS, MAX_CONDITIONS, MAX_POLICIES,
        MAX_RULES, MAX_SOURCES, PlaceKey, Policies, Policy, Rule, RuleCell, SourceKey, Spending,
        admit, matching, search,
    },
    atomic::AtomicU64,
    layout::{EPOCHS, MAX_PLACES, MAX_VIRTUAL_SERVERS},
    reason::DropReason,
    service::{PrefixKey, Service},
};

use super::{BPF_F_MMAPABLE, KernelTables, count_drop, record};

/// Only insert what is not there (linux/bpf.h).
const BPF_NOEXIST: u64 = 1;
use crate::{
    access::{self as ask, Knock},
    atomic,
    opaque::opaque,
    tables::Access,
};

#[map]
static PREFIXES: LpmTrie<PrefixKey, Service> = LpmTrie::with_max_entries(EPOCHS * MAX_PLACES, 0);
#[map]
static GUARDS: Array<Guard> = Array::with_max_entries(EPOCHS * MAX_VIRTUAL_SERVERS, 0);
#[map]
static POLICIES: Array<Policy> = Array::with_max_entries(EPOCHS * MAX_POLICIES, 0);
#[map]
static RULES: Array<Rule> = Array::with_max_entries(EPOCHS * MAX_RULES, 0);
#[map]
static BOUNDS: Array<Bound> = Array::with_max_entries(EPOCHS * MAX_BOUNDS, BPF_F_MMAPABLE);
#[map]
static SCHEDULED: Array<u64> = Array::with_max_entries(EPOCHS * MAX_POLICIES, 0);
#[map]
static CONDITIONS: HashMap<PlaceKey, u64> = HashMap::with_max_entries(EPOCHS * MAX_CONDITIONS, 0);
/// Interfaces whose packets are judged by a packet program, by index.
#[map]
static JUDGED: HashMap<u32, u32> = HashMap::with_max_entries(128, 0);
/// Rules of two generations have numbers at a time.
#[map]
static RULE_CELLS: PerCpuArray<RuleCell> = PerCpuArray::with_max_entries(EPOCHS * MAX_RULES, 0);
#[map]
static SOURCES: LruHashMap<SourceKey, AtomicU64> = LruHashMap::with_max_entries(MAX_SOURCES, 0);
#[map]
static BUDGETS: PerCpuArray<Budget> = PerCpuArray::with_max_entries(Spending::COUNT, 0);
/// Linux 5.8.
#[map]
static EVENTS: RingBuf = RingBuf::with_byte_size(1 << 18, 0);
/// Who wants to connect, for the functions that are asked about it.
#[map]
static KNOCK: PerCpuArray<Knock> = PerCpuArray::with_max_entries(1, 0);
#[map]
static EXPLANATION: Array<Explanation> = Array::with_max_entries(1, 0);

/// Bits of a [`PrefixKey`]: the whole of it.
const PREFIX_BITS: u32 = 8 * size_of::<PrefixKey>() as u32;

/// Is an interface without a packet program, so that nobody has judged its packets yet?
#[inline(always)]
pub fn is_unjudged(interface: u32) -> bool {
    JUDGED.get_ptr(interface).is_none()
}

/// Time that a rate can be told by, nanoseconds: the coarse clock stands still for milliseconds.
#[inline(always)]
fn precise() -> u64 {
    // SAFETY: helper call without arguments.
    unsafe { helpers::generated::bpf_ktime_get_ns() }
}

impl Policies for KernelTables {
    #[inline(always)]
    fn policy(&self, index: u32) -> Option<&Policy> {
        record(&POLICIES, index)
    }

    #[inline(always)]
    fn bound(&self, index: u32) -> Option<&Bound> {
        record(&BOUNDS, index)
    }

    #[inline(always)]
    fn scheduled(&self, policy: u32) -> u64 {
        record(&SCHEDULED, policy).copied().unwrap_or(0)
    }

    #[inline(always)]
    fn place(&self, key: &PlaceKey) -> Option<u64> {
        // SAFETY: the value is copied out.
        unsafe { CONDITIONS.get(key) }.copied()
    }

    #[inline(always)]
    fn opaque(&self, number: u32) -> u32 {
        opaque(u64::from(number)) as u32
    }

    #[inline(always)]
    fn search(&self, first: u32, count: u32, high: u64, low: u64) -> u32 {
        search_bounds(first, count, high, low)
    }
}

/// A function of its own for the verifier (Linux 5.6).
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn search_bounds(first: u32, count: u32, high: u64, low: u64) -> u32 {
    search(&KernelTables, first, count, high, low)
}

impl Access for KernelTables {
    #[inline(always)]
    fn clock(&self) -> u64 {
        precise()
    }

    #[inline(always)]
    fn guard(&self, index: u32) -> Option<&Guard> {
        record(&GUARDS, index)
    }

    #[inline(always)]
    fn rule(&self, index: u32) -> Option<&Rule> {
        record(&RULES, index)
    }

    #[inline(always)]
    fn prefix(&self, key: &PrefixKey) -> Option<&Service> {
        PREFIXES.get(Key::new(PREFIX_BITS, *key))
    }

    #[inline(always)]
    fn count_rule(&self, number: u32, staged: bool) {
        if let Some(cell) = RULE_CELLS.get_ptr_mut(number) {
            // SAFETY: the record is this CPU's own.
            unsafe {
                if staged {
                    (*cell).staged += 1;
                } else {
                    (*cell).hits += 1;
                }
            }
        }
    }

    #[inline(always)]
    fn count_drop(&self, reason: DropReason) {
        count_drop(reason);
    }

    #[inline(always)]
    fn within_rate(&self, key: &SourceKey, interval: u64, ahead: u64, counts: bool) -> bool {
        let now = precise();
        let Some(pointer) = SOURCES.get_ptr(key) else {
            if counts {
                // Two first connections at once count as one: nobody is refused by it.
                let due = AtomicU64::default();
                due.store(now + interval, Relaxed);
                let _ = SOURCES.insert(key, due, BPF_NOEXIST);
            }
            return true;
        };
        // SAFETY: map records live as long as the program, and all that changes in this one is atomic.
        let cell = unsafe { &*pointer };
        // Each CPU that is met there was admitted: the third in a row is let in uncounted.
        for _ in 0..3 {
            let due = cell.load(Relaxed);
            let Some(next) = admit(due, now, interval, ahead) else {
                return false;
            };
            if !counts || atomic::swap_if_u64(cell, due, next) {
                return true;
            }
        }
        true
    }

    #[inline(always)]
    fn spend(&self, what: Spending) -> bool {
        let Some(budget) = BUDGETS.get_ptr_mut(what as u32) else {
            return false;
        };
        // SAFETY: the record is this CPU's own.
        let budget = unsafe { &mut *budget };
        match admit(budget.due, precise(), Spending::INTERVAL, Spending::AHEAD) {
            Some(due) => budget.due = due,
            None => {
                budget.refused += 1;
                return false;
            }
        }
        true
    }

    #[inline(always)]
    fn announce(&self, event: &Event) {
        if EVENTS.output::<Event>(event, 0).is_err()
            && let Some(budget) = BUDGETS.get_ptr_mut(Spending::Events as u32)
        {
            // SAFETY: the record is this CPU's own.
            unsafe { (*budget).refused += 1 };
        }
    }

    #[inline(always)]
    fn explain(&self, explanation: &Explanation) {
        let _ = EXPLANATION.set(0, explanation, 0);
    }

    #[inline(always)]
    fn hold(&self, knock: &Knock) {
        if let Some(held) = KNOCK.get_ptr_mut(0) {
            // SAFETY: the record is this CPU's own.
            unsafe { *held = *knock };
        }
    }

    #[inline(always)]
    fn ask(&self, policy: u32, kind: u8, _: &Knock) -> u32 {
        if policy == 0 {
            return ask::ACCEPTED;
        }
        ask_policy(policy, u32::from(kind))
    }

    #[inline(always)]
    fn match_rule(&self, policy: u32, _: &Knock) -> u32 {
        if policy == 0 {
            return 0;
        }
        match_policy(policy)
    }
}

/// A function of its own for the verifier (Linux 5.6).
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn ask_policy(policy: u32, kind: u32) -> u32 {
    let Some(knock) = KNOCK.get_ptr(0) else {
        return Action::Drop as u32;
    };
    // SAFETY: the record is this CPU's own.
    ask::ask(&KernelTables, policy, kind as u8, unsafe { &*knock })
}

/// A function of its own for the verifier (Linux 5.6).
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn match_policy(policy: u32) -> u32 {
    let Some(knock) = KNOCK.get_ptr(0) else {
        return 0;
    };
    // SAFETY: the record is this CPU's own.
    let arrival = unsafe { &(*knock).arrival };
    matching(&KernelTables, policy, arrival).unwrap_or(0)
}
