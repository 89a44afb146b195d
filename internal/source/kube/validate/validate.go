// Package validate checks the specs of Istio's objects for what their CRDs'
// schemas cannot say: names, weights, regular expressions, exclusive fields.
//
// internal/source/kube calls it for each object before it becomes a row; an
// object that fails keeps its last valid row, and gets the findings as a status
// condition. Every function is pure and returns one line per problem, each
// beginning with the field ("spec.http[0].timeout: …"); none means valid. The
// rules are those of Istio's reference documentation, or stricter where Envoy
// would refuse what came of it.
package validate

import (
	"fmt"
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	typev1beta1 "istio.io/api/type/v1beta1"
)

// findings collects the problems of one object.
type findings struct{ list []string }

func (f *findings) add(field, format string, args ...any) {
	f.list = append(f.list, field+": "+fmt.Sprintf(format, args...))
}

// check adds err, if there is one.
func (f *findings) check(field string, err error) {
	if err != nil {
		f.add(field, "%s", err)
	}
}

var (
	label     = regexp.MustCompile(`^[a-zA-Z0-9]([-a-zA-Z0-9]{0,61}[a-zA-Z0-9])?$`)
	hostLabel = regexp.MustCompile(`^[a-zA-Z0-9_]([-a-zA-Z0-9_]{0,61}[a-zA-Z0-9_])?$`)
	portName  = regexp.MustCompile(`^[a-zA-Z0-9]([-a-zA-Z0-9_.]{0,61}[a-zA-Z0-9])?$`)
	tagKey    = regexp.MustCompile(`^([a-zA-Z0-9]([-a-zA-Z0-9.]{0,251}[a-zA-Z0-9])?/)?[a-zA-Z0-9]([-a-zA-Z0-9_.]{0,61}[a-zA-Z0-9])?$`)
	tagValue  = regexp.MustCompile(`^([a-zA-Z0-9]([-a-zA-Z0-9_.]{0,61}[a-zA-Z0-9])?)?$`)
	token     = regexp.MustCompile("^[!#$%&'*+.^_`|~0-9A-Za-z-]+$")
)

// hostname accepts a DNS name, relative or not, without wildcards.
func hostname(s string) error {
	if s == "" {
		return fmt.Errorf("a host is required")
	}
	if len(s) > 255 {
		return fmt.Errorf("host %q has more than 255 characters", s)
	}
	for part := range strings.SplitSeq(strings.TrimSuffix(s, "."), ".") {
		if !hostLabel.MatchString(part) {
			return fmt.Errorf("%q is not a host name: label %q must be 1 to 63 letters, digits or '-'", s, part)
		}
	}
	return nil
}

// wildcardHost also accepts "*" and "*.example.com".
func wildcardHost(s string) error {
	if s == "*" {
		return nil
	}
	rest := strings.TrimPrefix(s, "*.")
	if strings.Contains(rest, "*") {
		return fmt.Errorf("%q is not a host: a wildcard can only be its first label, as in *.example.com", s)
	}
	return hostname(rest)
}

func port(n uint32) error {
	if n < 1 || n > 65535 {
		return fmt.Errorf("port %d is not within 1–65535", n)
	}
	return nil
}

// ipOrPrefix accepts an address or a CIDR.
func ipOrPrefix(s string) error {
	if strings.Contains(s, "/") {
		if _, err := netip.ParsePrefix(s); err != nil {
			return fmt.Errorf("%q is not a CIDR", s)
		}
		return nil
	}
	if _, err := netip.ParseAddr(s); err != nil {
		return fmt.Errorf("%q is neither an IP address nor a CIDR", s)
	}
	return nil
}

// re2 is the syntax of both Go's and Envoy's regular expressions.
func re2(s string) error {
	if s == "" {
		return fmt.Errorf("a regular expression must not be empty")
	}
	if _, err := regexp.Compile(s); err != nil {
		return fmt.Errorf("not a RE2 regular expression: %w", err)
	}
	return nil
}

// duration accepts nothing, or at least a millisecond (what Envoy counts in).
func duration(d *durationpb.Duration) error {
	if d == nil {
		return nil
	}
	if err := d.CheckValid(); err != nil {
		return fmt.Errorf("not a duration: %w", err)
	}
	if v := d.AsDuration(); v < time.Millisecond {
		return fmt.Errorf("%s is too short: at least 1ms", v)
	}
	return nil
}

// durationOrZero also accepts 0, which turns something off.
func durationOrZero(d *durationpb.Duration) error {
	if d.CheckValid() == nil && d.AsDuration() == 0 {
		return nil
	}
	return duration(d)
}

func percent(v float64) error {
	if v < 0 || v > 100 || v != v {
		return fmt.Errorf("%v is not within 0–100", v)
	}
	return nil
}

func notNegative[N int32 | int64](n N) error {
	if n < 0 {
		return fmt.Errorf("%d is negative", n)
	}
	return nil
}

func (f *findings) labels(field string, labels map[string]string) {
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		if !tagKey.MatchString(k) {
			f.add(field, "%q is not a label's key", k)
		}
		if !tagValue.MatchString(labels[k]) {
			f.add(field, "%q is not a label's value (key %s)", labels[k], k)
		}
	}
}

func (f *findings) selector(field string, s *typev1beta1.WorkloadSelector) {
	for _, k := range slices.Sorted(maps.Keys(s.GetMatchLabels())) {
		v := s.GetMatchLabels()[k]
		switch {
		case k == "":
			f.add(field+".matchLabels", "a key is empty")
		case strings.Contains(k, "*") || strings.Contains(v, "*"):
			f.add(field+".matchLabels", "%s=%s: wildcards are not possible", k, v)
		}
	}
}

func (f *findings) exportTo(field string, values []string) {
	seen := map[string]bool{}
	for i, v := range values {
		at := fmt.Sprintf("%s[%d]", field, i)
		if v != "." && v != "*" && v != "~" && !label.MatchString(v) {
			f.add(at, "%q is neither a namespace nor one of . * ~", v)
		}
		if seen[v] {
			f.add(at, "%q is listed twice", v)
		}
		seen[v] = true
	}
	if len(values) > 1 && (seen["*"] || seen["~"]) {
		f.add(field, `"*" and "~" must stand alone`)
	}
}
