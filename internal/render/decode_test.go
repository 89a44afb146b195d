package render

import (
	"encoding"
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"isthmus.dev/internal/ir"
)

// enums are written by name in golden inputs.
var enums = map[reflect.Type][]string{
	reflect.TypeFor[ir.Protocol]():     {"Auto", "HTTP1", "HTTP2", "TCP"},
	reflect.TypeFor[ir.ClusterKind]():  {"EDS", "StrictDNS", "LogicalDNS", "OriginalDst"},
	reflect.TypeFor[ir.LBPolicy]():     {"LeastRequest", "RoundRobin", "Random", "ClientAddress", "RingHash", "Maglev"},
	reflect.TypeFor[ir.TLSMode]():      {"Auto", "Disable", "IstioMutual", "Simple", "Mutual"},
	reflect.TypeFor[ir.MTLSMode]():     {"Permissive", "Strict", "Plaintext"},
	reflect.TypeFor[ir.PolicyAction](): {"Allow", "Deny", "Audit"},
}

// decodeYAML reads ir values as people write them: fields by name (in any case),
// enums by name, durations and addresses as text.
func decodeYAML(text []byte, into any) error {
	var tree any
	if err := yaml.Unmarshal(text, &tree); err != nil {
		return err
	}
	return decode(tree, reflect.ValueOf(into).Elem(), "")
}

func decode(from any, to reflect.Value, path string) error {
	if names, ok := enums[to.Type()]; ok {
		for i, n := range names {
			if n == from {
				to.SetUint(uint64(i))
				return nil
			}
		}
		return fmt.Errorf("%s: %v is none of %v", path, from, names)
	}
	if s, ok := from.(string); ok {
		if to.Type() == reflect.TypeFor[time.Duration]() {
			d, err := time.ParseDuration(s)
			to.SetInt(int64(d))
			return err
		}
		if u, ok := to.Addr().Interface().(encoding.TextUnmarshaler); ok {
			return u.UnmarshalText([]byte(s))
		}
		if to.Type() == reflect.TypeFor[[]byte]() {
			to.SetBytes([]byte(s))
			return nil
		}
	}
	switch to.Kind() {
	case reflect.Pointer:
		to.Set(reflect.New(to.Type().Elem()))
		return decode(from, to.Elem(), path)
	case reflect.Slice:
		list, ok := from.([]any)
		if !ok {
			return fmt.Errorf("%s: not a list", path)
		}
		to.Set(reflect.MakeSlice(to.Type(), len(list), len(list)))
		for i, x := range list {
			if err := decode(x, to.Index(i), fmt.Sprintf("%s[%d]", path, i)); err != nil {
				return err
			}
		}
		return nil
	case reflect.Struct:
		fields, ok := from.(map[string]any)
		if !ok && from != nil {
			return fmt.Errorf("%s: not a map", path)
		}
		for name, x := range fields {
			f := to.FieldByNameFunc(func(n string) bool { return strings.EqualFold(n, name) })
			if !f.IsValid() {
				return fmt.Errorf("%s: no field %s", path, name)
			}
			if err := decode(x, f, path+"."+name); err != nil {
				return err
			}
		}
		return nil
	}
	text, err := json.Marshal(from)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(text, to.Addr().Interface()); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

func TestDecode(t *testing.T) {
	var c ir.Cluster
	err := decodeYAML([]byte("{name: a, protocol: HTTP2, connectTimeout: 3s, outlier: {maxEjectionPercent: 7}, endpoints: {localities: [{endpoints: [{address: 10.0.0.1}]}]}}"), &c)
	if err != nil {
		t.Fatal(err)
	}
	if c.Protocol != ir.HTTP2 || c.ConnectTimeout != 3*time.Second || *c.Outlier.MaxEjectionPercent != 7 ||
		c.Endpoints.Localities[0].Endpoints[0].Address.String() != "10.0.0.1" {
		t.Errorf("got %+v", c)
	}
	for _, bad := range []string{"{nam: a}", "{protocol: HTTP3}", "{connectTimeout: soon}", "{endpoints: [1]}"} {
		if err := decodeYAML([]byte(bad), &ir.Cluster{}); err == nil {
			t.Errorf("%s: no error", bad)
		}
	}
}
