// Package validating is the validating admission webhook for the objects of the
// mesh: whoever applies an invalid one is told so at once, and it never replaces
// a valid one.
//
// Flow: the API server posts an AdmissionReview (internal/admission) for each of
// Istio's objects that this version acts on, created or updated in any served
// version; the Validator reads its spec as the informers do (decode.go), checks it
// with internal/source/kube/validate and refuses it with every finding; what is
// valid and has no effect, or not the one meant in the light of other objects,
// is let through with a warning, which kubectl prints. internal/server mounts the
// Validator at /validate on port 15017, and calls Register.
//
// What passes though it is invalid: deletions, status writes, objects that are
// being deleted (their finalizers must go), and an update that leaves an object
// no worse than it was (a label on it, or one of two mistakes repaired).
//
// # Failure policy
//
// The webhook's failurePolicy is Ignore: while no isthmusd answers, objects are
// written unchecked. With Fail nobody could edit the mesh while isthmusd restarts,
// is upgraded or is broken, which is when somebody may need to; and isthmusd itself
// writes WorkloadEntries, whose registration must not depend on a replica's
// listener. The second line is internal/source/kube: it validates every object
// again, keeps the last valid row of one that is not, and says so in the condition
// Accepted. What is left is an object that was made invalid while isthmusd was
// away: there is no last valid row of it then. Of an AuthorizationPolicy its valid
// rules count; any other has no effect until it is repaired.
//
// JoinTokens are not sent here: the CEL rules of their CRD say all that an object
// of its own can be asked, and they hold while isthmusd is away too.
package validating

import (
	"fmt"
	"log/slog"
	"net/http"
	"regexp"
	"strings"

	"google.golang.org/protobuf/proto"
	admissionv1 "k8s.io/api/admission/v1"

	"isthmus.dev/internal/admission"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/source/kube/validate"
	"isthmus.dev/internal/status"
)

// Config of a Validator.
type Config struct {
	// Unsupported lists the fields of a spec that have no effect in this version
	// (resolve.Unsupported); nil lists none.
	Unsupported func(spec proto.Message) []string
	// Remarks are what is wrong with a valid object in the light of others
	// (resolve.Check); nil makes none.
	Remarks func(key model.Key, spec proto.Message) []string
	Log     *slog.Logger
}

// Validator answers admission reviews; it holds no state.
type Validator struct {
	admission.Handler
	cfg Config
}

// New makes a Validator.
func New(cfg Config) *Validator {
	if cfg.Unsupported == nil {
		cfg.Unsupported = func(proto.Message) []string { return nil }
	}
	if cfg.Remarks == nil {
		cfg.Remarks = func(model.Key, proto.Message) []string { return nil }
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	v := &Validator{cfg: cfg}
	v.Handler = admission.Handler{Respond: v.respond, Log: cfg.Log}
	return v
}

func (v *Validator) respond(r *admissionv1.AdmissionRequest) *admissionv1.AdmissionResponse {
	allowed := &admissionv1.AdmissionResponse{Allowed: true}
	if r.SubResource != "" || r.Operation != admissionv1.Create && r.Operation != admissionv1.Update {
		return allowed
	}
	kind, ok := kindOf(r.Resource.Group, r.Resource.Resource)
	if !ok {
		return allowed
	}
	o, err := decode(kind, r.Object.Raw)
	if err != nil {
		return admission.Refuse(fmt.Sprintf("the request's object is not a %s: %v", kind, err), http.StatusBadRequest)
	}
	if o.meta.DeletionTimestamp != nil {
		return allowed
	}
	problems := o.problems()
	if len(problems) == 0 {
		allowed.Warnings = v.warnings(r, o)
		return allowed
	}
	name := named(r, o)
	if r.Operation == admissionv1.Update {
		if old, err := decode(kind, r.OldObject.Raw); err == nil && noWorse(problems, old.problems()) {
			allowed.Warnings = short(append([]string{fmt.Sprintf("%s %s was invalid before and still is, so it has no effect as written", kind, name)}, problems...))
			return allowed
		}
	}
	v.cfg.Log.Info("object refused", "kind", string(kind), "object", name, "problems", problems)
	return admission.Refuse(refusal(kind, name, problems), http.StatusUnprocessableEntity)
}

// named is NAMESPACE/NAME, for words.
func named(r *admissionv1.AdmissionRequest, o *object) string {
	name := r.Name
	if name == "" {
		if name = o.meta.Name; name == "" {
			name = o.meta.GenerateName
		}
	}
	return r.Namespace + "/" + name
}

// maxFindings keeps a refusal readable: whoever has more mistakes in one object
// repairs these first.
const maxFindings = 10

func refusal(kind status.Kind, name string, problems []string) string {
	more := ""
	if n := len(problems) - maxFindings; n > 0 {
		problems, more = problems[:maxFindings], fmt.Sprintf("; and %d more", n)
	}
	return fmt.Sprintf("%s %s is invalid: %s%s. Correct it and apply it again; nothing was changed.",
		kind, name, strings.Join(problems, "; "), more)
}

// warnings about a valid object.
func (v *Validator) warnings(r *admissionv1.AdmissionRequest, o *object) []string {
	var list []string
	for _, path := range o.unknown {
		list = append(list, fmt.Sprintf("spec.%s: no such field is known to this version of Isthmus: it has no effect", path))
	}
	for _, path := range v.cfg.Unsupported(o.spec) {
		list = append(list, fmt.Sprintf("spec.%s: not supported in this version of Isthmus: it has no effect", path))
	}
	list = append(list, validate.WithoutEffect(o.meta.Annotations, o.spec)...)
	list = append(list, v.cfg.Remarks(model.Key{Namespace: r.Namespace, Name: o.meta.Name}, o.spec)...)
	return short(list)
}

// The API server cuts warnings above these sizes without a word.
const (
	maxWarning  = 256
	maxWarnings = 4096 / maxWarning
)

func short(list []string) []string {
	if n := len(list) - maxWarnings; n > 0 {
		list = append(list[:maxWarnings-1:maxWarnings-1], fmt.Sprintf("and %d more: see the object's status", n+1))
	}
	for i, w := range list {
		if len(w) > maxWarning {
			list[i] = strings.ToValidUTF8(w[:maxWarning-len(" …")], "") + " …"
		}
	}
	return list
}

var index = regexp.MustCompile(`\[\d+\]`)

// noWorse tells whether every problem was there before. Positions in lists do not
// count: what comes before in a list may go.
func noWorse(problems, before []string) bool {
	had := map[string]int{}
	for _, p := range before {
		had[index.ReplaceAllString(p, "[]")]++
	}
	for _, p := range problems {
		p = index.ReplaceAllString(p, "[]")
		if had[p]--; had[p] < 0 {
			return false
		}
	}
	return true
}
