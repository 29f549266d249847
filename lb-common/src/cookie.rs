//! SYN cookies (RFC 4987 §3.6): what a half-open connection needs is kept by its client, as our first sequence number.
//!
//! The kernel's helpers (`bpf_tcp_raw_gen_syncookie_ipv4`, Linux 6.0) would not give the segment size back, so these are
//! our own: bit 0 says which of two periods, bits 1 and 2 the class of the segment size, the others are a keyed hash.

use crate::{flow::FlowKey, tcp};

/// Segment sizes that a cookie can say, bytes: IPv4's and IPv6's least (RFC 9293 §3.7.1), through a tunnel, over Ethernet.
pub const SIZES: [u16; 4] = [536, 1220, 1400, 1440];
/// A period is so many ticks, as a power of two: a cookie is good for one to two minutes.
const PERIOD: u32 = 6;
/// Ticks after which no cookie is good.
pub const LIFETIME: u32 = 2 << PERIOD;

/// The class of the largest size that is not beyond what a client takes.
#[inline(always)]
pub const fn class(size: u32) -> u32 {
    (size >= SIZES[1] as u32) as u32
        + (size >= SIZES[2] as u32) as u32
        + (size >= SIZES[3] as u32) as u32
}

/// The size of a class.
#[inline(always)]
pub const fn size(class: u32) -> u16 {
    SIZES[class as usize & 3]
}

/// The cookie for a client's first packet with this sequence number.
#[inline(always)]
pub fn bake(keys: &[u64; 2], key: &FlowKey, sequence: u32, class: u32, now_ns: u64) -> u32 {
    let period = tcp::tick(now_ns) >> PERIOD;
    signed(keys, key, sequence, class << 1 | period & 1, period)
}

/// Is it one of ours, and not too old? The class of the client's segment size then, else more than any.
#[inline(always)]
pub fn check(keys: &[u64; 2], key: &FlowKey, sequence: u32, cookie: u32, now_ns: u64) -> u32 {
    let now = tcp::tick(now_ns) >> PERIOD;
    let period = now.wrapping_sub((now ^ cookie) & 1);
    match signed(keys, key, sequence, cookie & 7, period) == cookie {
        true => cookie >> 1 & 3,
        false => NONE,
    }
}

/// What [`check`] says of a cookie that is none.
pub const NONE: u32 = 4;

#[inline(always)]
fn signed(keys: &[u64; 2], key: &FlowKey, sequence: u32, open: u32, period: u32) -> u32 {
    let pair = |low: u32, high: u32| low as u64 | (high as u64) << 32;
    let ports = key.sport as u32 | (key.dport as u32) << 16;
    let words = [
        pair(key.src.0[0], key.src.0[1]),
        pair(key.src.0[2], key.src.0[3]),
        pair(key.dst.0[0], key.dst.0[1]),
        pair(key.dst.0[2], key.dst.0[3]),
        pair(ports, sequence),
        pair(open, period),
    ];
    (sip(keys, &words) as u32) << 3 | open
}

/// Words that are hashed.
const WORDS: usize = 6;

/// SipHash-2-4 (Aumasson and Bernstein, 2012), made for this: short input, and nobody without the key can say what comes
/// out.
#[inline(always)]
fn sip(keys: &[u64; 2], words: &[u64; WORDS]) -> u64 {
    let mut state = [
        keys[0] ^ 0x736f_6d65_7073_6575,
        keys[1] ^ 0x646f_7261_6e64_6f6d,
        keys[0] ^ 0x6c79_6765_6e65_7261,
        keys[1] ^ 0x7465_6462_7974_6573,
    ];
    for place in 0..=WORDS {
        let word = match place {
            WORDS => (WORDS as u64 * 8) << 56,
            place => words[place],
        };
        state[3] ^= word;
        round(&mut state);
        round(&mut state);
        state[0] ^= word;
    }
    state[2] ^= 0xff;
    for _ in 0..4 {
        round(&mut state);
    }
    state[0] ^ state[1] ^ state[2] ^ state[3]
}

#[inline(always)]
fn round(state: &mut [u64; 4]) {
    let [mut a, mut b, mut c, mut d] = *state;
    a = a.wrapping_add(b);
    b = b.rotate_left(13) ^ a;
    a = a.rotate_left(32);
    c = c.wrapping_add(d);
    d = d.rotate_left(16) ^ c;
    a = a.wrapping_add(d);
    d = d.rotate_left(21) ^ a;
    c = c.wrapping_add(b);
    b = b.rotate_left(17) ^ c;
    c = c.rotate_left(32);
    *state = [a, b, c, d];
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{addr::Addr, tcp::TICK_SHIFT};

    const KEYS: [u64; 2] = [0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908];
    const KEY: FlowKey = FlowKey {
        src: Addr([1, 2, 3, 4]),
        dst: Addr([5, 6, 7, 8]),
        sport: 9,
        dport: 10,
    };

    fn at(tick: u64) -> u64 {
        tick << TICK_SHIFT
    }

    #[test]
    #[expect(deprecated, reason = "the library's own SipHash-2-4 with given keys")]
    fn the_hash_is_siphash() {
        use std::hash::{Hasher as _, SipHasher};
        for seed in 0..100u64 {
            let words = core::array::from_fn(|place| (seed + 1).wrapping_mul(place as u64 + 77));
            let keys = [seed.wrapping_mul(0x9e37_79b9_7f4a_7c15), !seed];
            let mut hasher = SipHasher::new_with_keys(keys[0], keys[1]);
            words
                .iter()
                .for_each(|word| hasher.write(&u64::to_le_bytes(*word)));
            assert_eq!(sip(&keys, &words), hasher.finish());
        }
    }

    #[test]
    fn a_cookie_is_good_for_a_minute_and_no_longer_than_two() {
        for (tick, class) in [(0, 0), (63, 1), (64, 2), (1_000_000, 3)] {
            let cookie = bake(&KEYS, &KEY, 7, class, at(tick));
            for later in [0, 1, 63, 64] {
                assert_eq!(check(&KEYS, &KEY, 7, cookie, at(tick + later)), class);
            }
            let lifetime = u64::from(LIFETIME);
            for later in [lifetime, 10 * lifetime, 1 << 20] {
                assert_eq!(check(&KEYS, &KEY, 7, cookie, at(tick + later)), NONE);
            }
        }
    }

    #[test]
    fn it_fits_nobody_else() {
        let cookie = bake(&KEYS, &KEY, 7, 3, at(100));
        let mut others = [KEY; 4];
        others[0].src.0[3] ^= 1;
        others[1].dst.0[0] ^= 1 << 31;
        (others[2].sport, others[3].dport) = (8, 11);
        for other in others {
            assert_eq!(check(&KEYS, &other, 7, cookie, at(100)), NONE);
        }
        assert_eq!(check(&KEYS, &KEY, 8, cookie, at(100)), NONE);
        assert_eq!(check(&[KEYS[0], 1], &KEY, 7, cookie, at(100)), NONE);
        for bit in 0..32 {
            assert_eq!(check(&KEYS, &KEY, 7, cookie ^ 1 << bit, at(100)), NONE);
        }
    }

    #[test]
    fn no_client_gets_more_than_it_takes() {
        for (offered, got) in [
            (0, 536),
            (535, 536),
            (1219, 536),
            (1220, 1220),
            (1399, 1220),
            (1452, 1440),
            (65_535, 1440),
        ] {
            assert_eq!(size(class(offered)), got);
        }
    }
}
