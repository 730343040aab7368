{{/* The GPU of `preset`, as JSON; {} without a preset. */}}
{{- define "serving.preset" -}}
{{- if .Values.preset }}
{{- get (.Files.Get "files/presets.yaml" | fromYaml) .Values.preset | toJson }}
{{- else -}}
{}
{{- end }}
{{- end }}

{{/* Defaults from the preset for values that are not set. */}}
{{- define "serving.dtype" -}}
{{- $preset := include "serving.preset" . | fromJson }}
{{- ternary ($preset.dtype | default "auto") .Values.vllm.dtype (eq .Values.vllm.dtype "auto") }}
{{- end }}
{{- define "serving.checkDtype" -}}
{{- $card := include "serving.preset" . | fromJson }}
{{- if and $card (eq .Values.vllm.dtype "bfloat16") (lt (float64 $card.capability) 8.0) }}
{{- fail (printf "vllm.dtype bfloat16: a %s (compute capability %.1f) does not support it: set vllm.dtype to float16, or to auto" .Values.preset (float64 $card.capability)) }}
{{- end }}
{{- end }}

{{- define "serving.utilization" -}}
{{- $preset := include "serving.preset" . | fromJson }}
{{- .Values.vllm.gpuMemoryUtilization | default $preset.utilization | default 0.9 }}
{{- end }}
{{- define "serving.chunk" -}}
{{- $preset := include "serving.preset" . | fromJson }}
{{- .Values.vllm.maxNumBatchedTokens | default $preset.chunk | default "" }}
{{- end }}

{{/* Sizes of the model, as JSON; {} if unknown. */}}
{{- define "serving.sizes" -}}
{{- .Values.model.sizes | default (get (.Files.Get "files/models.yaml" | fromYaml) .Values.model.name) | default dict | toJson }}
{{- end }}

{{/* Minutes for loading and compiling: ten plus one for every 6 GB of weights (100 MB/s), at least 15. */}}
{{- define "serving.startupMinutes" -}}
{{- $sizes := include "serving.sizes" . | fromJson }}
{{- $loading := divf (mulf 2.0 ($sizes.parameters | default 0)) 6e9 | ceil | int }}
{{- .Values.startupTimeoutMinutes | default (max 15 (add 10 $loading)) | int }}
{{- end }}

{{/* Converts a Kubernetes quantity to bytes. */}}
{{- define "serving.bytes" -}}
{{- $units := dict "" 1 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 }}
{{- mulf (regexFind "^[0-9.]+" . | float64) (get $units (regexFind "[A-Za-z]*$" .)) | int64 }}
{{- end }}

{{/* Rejects a context that does not fit the GPU, with the arithmetic (docs/serving.md). Bytes per GPU, GiB in the message. */}}
{{- define "serving.checkFit" -}}
{{- $card := include "serving.preset" . | fromJson }}
{{- $sizes := include "serving.sizes" . | fromJson }}
{{- if and $sizes (mod (int $sizes.heads) (int .Values.vllm.tensorParallelSize)) }}
{{- fail (printf "vllm.tensorParallelSize %d does not divide the %d heads of %s: use a divisor" (int .Values.vllm.tensorParallelSize) (int $sizes.heads) .Values.model.name) }}
{{- end }}
{{- if and $card $sizes .Values.vllm.maxModelLen (gt (int .Values.gpu.count) 0) }}
{{- $ranks := .Values.vllm.tensorParallelSize | int }}
{{- $gib := 1073741824.0 }}
{{- $width := ternary 4 2 (eq (include "serving.dtype" .) "float32") }}
{{- $cached := ternary 1 $width (hasPrefix "fp8" .Values.vllm.kvCacheDtype) }}
{{- $usable := mulf $card.memoryGiB $gib (include "serving.utilization" . | float64) }}
{{- $weights := divf (mulf $sizes.parameters $width) $ranks }}
{{- /* Activations of a step: the residual stream and its copies, and three of the feed-forward layer. */}}
{{- $chunk := include "serving.chunk" . | default 8192 | int64 }}
{{- $step := mulf $chunk $width (addf (mulf 6 $sizes.hidden) (divf (mulf 3 $sizes.intermediate) $ranks)) }}
{{- /* Latents of up to 65,536 tokens, which a prefill reads at once, and the keys and values expanded from them. */}}
{{- $read := min 65536 (mul 8 (int64 .Values.vllm.maxModelLen)) }}
{{- $prefill := mulf $read $width (addf $sizes.latent (divf (mulf $sizes.heads $sizes.expanded) $ranks)) }}
{{- $other := mulf 1.5 $gib }}
{{- $left := subf $usable $weights $step $prefill $other }}
{{- $token := mulf $sizes.latent $sizes.layers $cached }}
{{- $needed := mulf .Values.vllm.maxModelLen $token }}
{{- if gt $needed $left }}
{{- $most := max 0 (mul 16 (floor (divf $left $token 16) | int64)) }}
{{- fail (printf "vllm.maxModelLen %d does not fit a %s: %.1f GiB x %v = %.2f GiB, less %.2f for weights (%d x %d bytes / %d GPUs), %.2f for a step of %d tokens, %.2f for the workspace of a prefill, %.2f for CUDA and graphs leaves %.2f GiB of cache; one request needs %d x %d bytes = %.2f GiB. At most %d tokens fit: lower vllm.maxModelLen, or use a larger GPU" (int64 .Values.vllm.maxModelLen) .Values.preset (float64 $card.memoryGiB) (include "serving.utilization" .) (divf $usable $gib) (divf $weights $gib) (int64 $sizes.parameters) $width $ranks (divf $step $gib) $chunk (divf $prefill $gib) (divf $other $gib) (divf $left $gib) (int64 .Values.vllm.maxModelLen) (int64 $token) (divf $needed $gib) $most) }}
{{- end }}
{{- end }}
{{- end }}

{{/* vLLM 0.32 stores offloaded blocks in /dev/shm, which counts as the container's memory. */}}
{{- define "serving.shmSize" -}}
{{- if .Values.kvOffload.cpuGiB }}
{{- printf "%dMi" (add (mul 1024 (int .Values.kvOffload.cpuGiB)) (divf (include "serving.bytes" .Values.shmSize | float64) 1048576 | int)) }}
{{- else }}
{{- .Values.shmSize }}
{{- end }}
{{- end }}

{{- define "serving.checkOffload" -}}
{{- with .Values.kvOffload }}
{{- if and .diskClaim (not (and .cpuGiB (eq .backend "native"))) }}
{{- fail "kvOffload.diskClaim requires kvOffload.cpuGiB and kvOffload.backend native: blocks reach the disk through the host's memory" }}
{{- end }}
{{- end }}
{{- $limit := dig "limits" "memory" "" .Values.resources | toString }}
{{- if and .Values.kvOffload.cpuGiB $limit }}
{{- $shm := include "serving.bytes" (include "serving.shmSize" .) | int64 }}
{{- if ge $shm (include "serving.bytes" $limit | int64) }}
{{- fail (printf "resources.limits.memory is %s, but /dev/shm alone takes %d MiB (kvOffload.cpuGiB %d, shmSize %s): raise the limit" $limit (div $shm 1048576) (int .Values.kvOffload.cpuGiB) .Values.shmSize) }}
{{- end }}
{{- end }}
{{- end }}

{{- define "serving.offloadArgs" -}}
{{- with .Values.kvOffload }}
{{- if .diskClaim }}
{{- $tier := dict "type" "fs" "root_dir" "/kv" }}
{{- $extra := dict "spec_name" "TieringOffloadingSpec" "cpu_bytes_to_use" (mul 1073741824 (int .cpuGiB)) "secondary_tiers" (list $tier) }}
- --kv-transfer-config
- {{ dict "kv_connector" "OffloadingConnector" "kv_role" "kv_both" "kv_connector_extra_config" $extra | toJson | quote }}
{{- else if .cpuGiB }}
- --kv-offloading-size
- {{ .cpuGiB | int | quote }}
- --kv-offloading-backend
- {{ .backend }}
{{- end }}
{{- end }}
{{- end }}

{{/* Node selector for the GPU, unless the values select nodes. */}}
{{- define "serving.affinity" -}}
{{- $affinity := deepCopy .Values.affinity }}
{{- $card := include "serving.preset" . | fromJson }}
{{- if and $card (not (hasKey .Values.nodeSelector "nvidia.com/gpu.product")) (not (hasKey $affinity "nodeAffinity")) }}
{{- $expression := dict "key" "nvidia.com/gpu.product" "operator" "In" "values" $card.products }}
{{- $terms := list (dict "matchExpressions" (list $expression)) }}
{{- $_ := set $affinity "nodeAffinity" (dict "requiredDuringSchedulingIgnoredDuringExecution" (dict "nodeSelectorTerms" $terms)) }}
{{- end }}
{{- if $affinity }}
{{- toYaml $affinity }}
{{- end }}
{{- end }}

{{- define "serving.tolerations" -}}
{{- $tolerations := .Values.tolerations }}
{{- if and .Values.preset (not $tolerations) }}
{{- $tolerations = list (dict "key" .Values.gpu.resourceName "operator" "Exists" "effect" "NoSchedule") }}
{{- end }}
{{- if $tolerations }}
{{- toYaml $tolerations }}
{{- end }}
{{- end }}
