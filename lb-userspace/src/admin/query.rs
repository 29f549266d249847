//! Questions as the query of a request: server and client share them.

use std::{fmt::Write as _, net::IpAddr};

use super::view::Question;

/// Flows of one answer, unless it asks for fewer.
pub const PAGE: u32 = 10_000;

/// Which flows. Everything that is set has to hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FlowQuery {
    /// Of this virtual server.
    pub virtual_server: Option<String>,
    /// To this member, `POOL/MEMBER`.
    pub member: Option<String>,
    /// From these clients.
    pub client: Option<Net>,
    /// In this phase.
    pub phase: Option<String>,
    /// At most so many in this answer.
    pub limit: Option<u32>,
    /// Goes on where an earlier answer has stopped.
    pub after: u32,
}

/// An address, or all that begin like it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Net {
    address: IpAddr,
    length: u8,
}

impl Net {
    /// Is this address in it?
    pub fn contains(&self, address: IpAddr) -> bool {
        let bits = |address: IpAddr| match address {
            IpAddr::V4(address) => (u128::from(address.to_bits()) << 96, 32),
            IpAddr::V6(address) => (address.to_bits(), 128),
        };
        let ((own, most), (other, width)) = (bits(self.address), bits(address));
        let free = 128 - u32::from(self.length);
        most == width && (free == 128 || own >> free == other >> free)
    }
}

impl std::str::FromStr for Net {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (address, length) = match text.split_once('/') {
            Some((address, length)) => (address, Some(length)),
            None => (text, None),
        };
        let wrong = || format!("`{text}` is no address, and no ADDRESS/LENGTH");
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let length = match length {
            Some(length) => length.parse().map_err(|_| wrong())?,
            None => most,
        };
        (length <= most)
            .then_some(Self { address, length })
            .ok_or_else(wrong)
    }
}

impl std::fmt::Display for Net {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

impl FlowQuery {
    /// As the part of a request behind the question mark; empty when everything is wanted.
    pub fn to_query(&self) -> String {
        let mut pairs = Vec::new();
        for (key, value) in [
            ("virtual_server", &self.virtual_server),
            ("member", &self.member),
            ("phase", &self.phase),
        ] {
            if let Some(value) = value {
                pairs.push((key, value.clone()));
            }
        }
        if let Some(client) = &self.client {
            pairs.push(("client", client.to_string()));
        }
        if let Some(limit) = self.limit {
            pairs.push(("limit", limit.to_string()));
        }
        if self.after > 0 {
            pairs.push(("after", self.after.to_string()));
        }
        query(&pairs)
    }

    /// From such a part.
    ///
    /// # Errors
    ///
    /// In words, when a key or a value is not understood.
    pub fn from_query(text: &str) -> Result<Self, String> {
        let mut found = Self::default();
        for (key, value) in pairs(text)? {
            let number = |value: &str| {
                value
                    .parse::<u32>()
                    .map_err(|_| format!("{key} = {value:?} is no number"))
            };
            match key.as_str() {
                "virtual_server" => found.virtual_server = Some(value),
                "member" => found.member = Some(value),
                "phase" => found.phase = Some(value),
                "client" => found.client = Some(value.parse()?),
                "limit" => found.limit = Some(number(&value)?),
                "after" => found.after = number(&value)?,
                _ => return Err(format!("flows are not chosen by {key:?}")),
            }
        }
        Ok(found)
    }
}

impl Question {
    /// As the part of a request behind the question mark.
    pub fn to_query(&self) -> String {
        let mut pairs = vec![("from", self.from.to_string()), ("to", self.to.to_string())];
        pairs.extend(self.interface.clone().map(|name| ("interface", name)));
        pairs.extend(self.vlan.map(|vlan| ("vlan", vlan.to_string())));
        query(&pairs)
    }

    /// From such a part.
    ///
    /// # Errors
    ///
    /// In words, when a key or a value is not understood, or an end is missing.
    pub fn from_query(text: &str) -> Result<Self, String> {
        let (mut from, mut to, mut interface, mut vlan) = (None, None, None, None);
        for (key, value) in pairs(text)? {
            let wrong = || format!("{key} = {value:?} is not understood");
            match key.as_str() {
                "from" => from = Some(value.parse().map_err(|_| wrong())?),
                "to" => to = Some(value.parse().map_err(|_| wrong())?),
                "interface" => interface = Some(value),
                "vlan" => vlan = Some(value.parse().map_err(|_| wrong())?),
                _ => return Err(format!("a connection is not explained by {key:?}")),
            }
        }
        Ok(Self {
            from: from.ok_or("`from=ADDRESS:PORT` is missing")?,
            to: to.ok_or("`to=ADDRESS:PORT` is missing")?,
            interface,
            vlan,
        })
    }
}

/// Keys and values as a query (RFC 3986 §3.4).
pub fn query(pairs: &[(&str, String)]) -> String {
    let mut out = String::new();
    for (key, value) in pairs {
        if !out.is_empty() {
            out.push('&');
        }
        let _ = write!(out, "{key}=");
        for byte in value.bytes() {
            if byte.is_ascii_alphanumeric() || b"-_.~/:".contains(&byte) {
                out.push(char::from(byte));
            } else {
                let _ = write!(out, "%{byte:02X}");
            }
        }
    }
    out
}

/// The keys and values of a query.
///
/// # Errors
///
/// In words, when it cannot be read.
pub fn pairs(text: &str) -> Result<Vec<(String, String)>, String> {
    let parts = text.split('&').filter(|part| !part.is_empty());
    parts
        .map(|part| {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            Ok((decoded(key)?, decoded(value)?))
        })
        .collect()
}

fn decoded(text: &str) -> Result<String, String> {
    let wrong = || format!("the query has a broken part: {text:?}");
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || char::from(rest.next()?).to_digit(16);
        match (digit(), digit()) {
            (Some(high), Some(low)) => bytes.push((high << 4 | low) as u8),
            _ => return Err(wrong()),
        }
    }
    String::from_utf8(bytes).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn survives_the_round_trip() {
        let query = FlowQuery {
            virtual_server: Some("a&b=c d".into()),
            member: Some("mx/[2001:db8::1]:25".into()),
            client: Some("2001:db8::/32".parse().unwrap()),
            phase: Some("syn".into()),
            limit: Some(7),
            after: 9,
        };
        assert_eq!(FlowQuery::from_query(&query.to_query()), Ok(query));
        assert_eq!(FlowQuery::default().to_query(), "");
        assert_eq!(FlowQuery::from_query(""), Ok(FlowQuery::default()));
        let question = Question {
            from: "[2001:db8::7]:40000".parse().unwrap(),
            to: "203.0.113.10:25".parse().unwrap(),
            interface: Some("a&to=b%é".into()),
            vlan: Some(10),
        };
        assert_eq!(Question::from_query(&question.to_query()), Ok(question));
    }

    #[test]
    fn what_is_not_understood_is_said() {
        for text in [
            "limit=x",
            "limit=-1",
            "colour=red",
            "client=host",
            "member=%4",
            "phase=%ff",
        ] {
            assert!(FlowQuery::from_query(text).is_err(), "{text}");
        }
        let ends = "from=192.0.2.1:1&to=192.0.2.2:25";
        assert!(Question::from_query(ends).is_ok());
        for text in ["", "from=192.0.2.1:1", "from=192.0.2.1&to=192.0.2.2:25"] {
            assert!(Question::from_query(text).is_err(), "{text}");
        }
        for more in ["vlan=x", "colour=red", "interface=%zz"] {
            let text = format!("{ends}&{more}");
            assert!(Question::from_query(&text).is_err(), "{text}");
        }
    }

    #[test]
    fn nets() {
        let holds = |net: &str, address: &str| {
            let net: Net = net.parse().unwrap();
            net.contains(address.parse().unwrap())
        };
        assert!(holds("192.0.2.7", "192.0.2.7") && !holds("192.0.2.7", "192.0.2.8"));
        assert!(holds("192.0.2.0/24", "192.0.2.255") && !holds("192.0.2.0/24", "192.0.3.0"));
        assert!(holds("0.0.0.0/0", "8.8.8.8") && !holds("0.0.0.0/0", "::1"));
        assert!(holds("::/0", "::1") && !holds("::/0", "192.0.2.1"));
        assert!(holds("2001:db8::/33", "2001:db8:7fff::1"));
        assert!(!holds("2001:db8::/33", "2001:db8:8000::1"));
        for wrong in [
            "",
            "192.0.2.0/33",
            "::/129",
            "192.0.2.0/",
            "x/8",
            "192.0.2.0/-1",
        ] {
            assert!(wrong.parse::<Net>().is_err(), "{wrong}");
        }
    }
}
