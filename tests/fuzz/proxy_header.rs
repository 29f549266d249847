//! Headers of a balancer in front.

use anyhow::Result;
use lb_userspace::proxy::header::{self, Malformed, Progress};
use tests::{
    fuzz::{run, signature},
    mail::random::Random,
};

const DICTIONARY: &[&[u8]] = &[
    b"PROXY ",
    b"TCP4 ",
    b"TCP6 ",
    b"UNKNOWN",
    b"192.0.2.1 ",
    b"2001:db8::1 ",
    b"65535",
    b" ",
    b"\r\n",
    b"\r",
    b"\n",
    b"\0",
    b"\r\n\r\n\0\r\nQUIT\n",
    b"\x21",
    b"\x20",
    b"\x11",
    b"\x00\x0c",
    b"\x00\x24",
    b"\xff\xff",
    b"\x03\x00\x04",
    b"\x20\x00\x05",
    b"x",
];

#[test]
fn proxy_header() -> Result<()> {
    run("proxy_header", DICTIONARY, check)
}

/// A verdict comes at one octet and stays, whatever follows; who was told is told again by a header of ours.
fn check(input: &[u8], _: &mut Random) -> u64 {
    let whole = header::parse(input);
    // Longer ones are decided by their first part.
    let near = input.len().min(header::LONGEST + 1);
    let mut decided: Option<Result<Progress, Malformed>> = None;
    for end in 0..=near {
        let verdict = header::parse(&input[..end]);
        match decided {
            Some(first) => assert_eq!(verdict, first, "at {end} of {input:?}"),
            None if verdict == Ok(Progress::More) => {}
            None => {
                if let Ok(Progress::Done { length, .. }) = verdict {
                    assert_eq!(length, end, "decided late: {input:?}");
                }
                decided = Some(verdict);
            }
        }
    }
    assert_eq!(whole, decided.unwrap_or(Ok(Progress::More)));
    if input.len() >= header::LONGEST {
        assert_ne!(whole, Ok(Progress::More), "waits for ever");
    }
    let Ok(Progress::Done { told, .. }) = whole else {
        return signature((whole.is_ok(), near));
    };
    if let Some((source, destination)) = told {
        let client = header::Client {
            source,
            destination,
            unique_id: "id",
            secured: None,
        };
        for again in [header::v1(source, destination), header::v2(&client)] {
            let length = again.len();
            assert_eq!(
                header::parse(&again),
                Ok(Progress::Done {
                    length,
                    told: Some((source, destination))
                })
            );
        }
    }
    signature((told.is_some(), input.first(), near))
}
